"""A trained model at work: decoding, generation, evaluation."""
