"""Audio encoders, projectors, the LLM and the model that joins them."""
