"""``python -m rmfx`` is the command ``rmfx``: what ``accelerate launch -m rmfx`` starts in every process."""

from rmfx.cli import main

if __name__ == "__main__":
    main()
