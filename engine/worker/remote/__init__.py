"""Workers that are started on other machines."""
