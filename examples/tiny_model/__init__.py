"""The parts of `examples/train_tiny_model.py`: corpus, tokenizer, model, training, sampling, export."""
