"""Defaults that the command line shows and the models apply. This module imports nothing."""

MAX_NEW_TOKENS = 200  # tokens of one answer
MAX_TOKENS_PER_SECOND = 15.0  # an answer has at most this many tokens per second of audio, plus ten
REPETITION_GUARD = 32  # tokens that a loop may fill before decoding stops
TRANSCRIPT_FORMATS = ("txt", "json", "srt", "vtt")
RATE = 16000  # Hz; every waveform reaches the model at this rate
AUDIO_EXTENSIONS = ("flac", "wav", "opus", "ogg", "mp3")  # of the audio in shards
