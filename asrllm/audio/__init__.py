"""Audio: from files and tar samples to waveforms, and from waveforms to features."""
