"""Running recipes: one class per kind of stage, and the run folder."""
