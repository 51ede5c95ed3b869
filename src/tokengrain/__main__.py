"""`python -m tokengrain`, for launchers: `accelerate launch -m tokengrain train recipe.yaml`."""

from tokengrain.cli import main

if __name__ == "__main__":
    main()
