"""The world `stories`: a grammar whose base distribution, reward and optimum are known exactly."""

from tokengrain.worlds.stories.world import StoriesOptions, StoriesWorld

__all__ = ["StoriesOptions", "StoriesWorld"]
