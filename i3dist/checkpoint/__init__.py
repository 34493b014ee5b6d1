"""What a run continues from: files of a checkpoint, the folder of checkpoints, final weights."""
