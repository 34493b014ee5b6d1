"""The i3 model: RWKV blocks, a chunk compressor, and attention over compressed history."""
