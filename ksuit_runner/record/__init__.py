"""What a run leaves on disk besides checkpoints: config, launch, journal and provenance."""
