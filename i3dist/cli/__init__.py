"""What all programs share: options, --extend, settings as text, paths, streams, errors."""
