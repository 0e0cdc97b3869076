"""The adapter: put in, run, saved, loaded, merged."""
