"""From a place in a tar to a waveform, and from waveforms to features."""
