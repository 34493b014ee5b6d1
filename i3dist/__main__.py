"""`python -m i3dist` is `i3dist`."""

from i3dist.programs.main import main

if __name__ == "__main__":
    main()
