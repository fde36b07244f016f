"""From utterances to packed batches: prompts, the chat, the audio token's expansion, labels."""
