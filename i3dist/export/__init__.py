"""Export of a trained run to transformers."""
