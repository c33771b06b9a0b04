"""The parts of `scripts/make_tiny_model.py`: pretraining documents, tokenizer, pretraining, measurement."""
