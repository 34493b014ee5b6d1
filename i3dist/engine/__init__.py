"""DeepSpeed ZeRO-2 behind one interface, and the flat tensors that it trains."""
