"""Predicts the classes of images, and shows what speaks for them.

The same as `conv2former predict`; `python scripts/predict.py --help` says more.
"""

from conv2former.commands.predict import run

if __name__ == "__main__":
    run()
