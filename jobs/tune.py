"""Search temperature, threshold, rounds and more without labels, on features that are encoded once.

python jobs/tune.py --space default --data photos/ --classes cat,dog --trials 64
"""

from lpclip.jobs.cli import run_command

if __name__ == "__main__":
    run_command("tune")
