"""The job: its ranks, devices, collectives, signals and watchdog."""
