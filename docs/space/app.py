"""The playground as a Space of Hugging Face: this file, README.md and requirements.txt are all of it."""

from fs_plugins.playground.__main__ import main

if __name__ == "__main__":
    main()
