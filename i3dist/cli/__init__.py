"""What every program shares: options, paths as typed, standard streams, settings files."""
