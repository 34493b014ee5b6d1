"""Reads what --source names: files, URLs, datasets of the hub, several sources as one."""
