"""The data format and its readers: manifest, schedule, shards, lanes."""
