"""DeepSpeed's ZeRO-2 behind one interface: `setup.build` returns an `Engine`."""
