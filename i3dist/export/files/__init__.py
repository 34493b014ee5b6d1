"""Files that an export holds as they are. They need torch and transformers, nothing of i3dist."""
