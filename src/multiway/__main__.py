"""``python -m multiway``, and what ``torchrun -m multiway`` starts."""

from multiway.cli import main

if __name__ == "__main__":
    main()
