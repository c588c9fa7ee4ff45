"""A long run of mixed good, bad and disconnecting clients against `octavo serve`."""
