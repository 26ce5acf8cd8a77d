"""`python -m detrcli` is `detr`."""

from detrcli.cli import main

if __name__ == "__main__":
    main()
