"""A long run of mixed valid, invalid and disconnecting clients against `octavo serve`."""
