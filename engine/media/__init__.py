"""Images and videos: where they come from, what they may be, how they become pixels."""
