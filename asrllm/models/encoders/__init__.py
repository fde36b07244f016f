"""Audio encoders: Whisper and Zipformer, and the table of their names."""
