"""Remote workers: started with `octavo worker`, usually on other machines."""
