"""Shows and describes an output of shard.py: what show.py and report.py say."""
