"""Each fast operation beside its plain twin."""
