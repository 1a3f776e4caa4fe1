"""Label images with a saved probe.

python jobs/predict.py --probe runs/selftrain/probe --data photos/ --out labels.parquet
"""

from lpclip.jobs.cli import run_command

if __name__ == "__main__":
    run_command("predict")
