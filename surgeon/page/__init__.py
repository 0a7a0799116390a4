"""A page to look at: one HTML file that shows what is known of a model, and loads nothing."""
