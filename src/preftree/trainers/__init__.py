"""Drop-in replacements for TRL's trainers of preference pairs."""
