"""Search temperature, threshold, rounds and more without labels, on features that are encoded once.

python jobs/tune.py --space tune_spaces/default.py --data photos/ --classes cat,dog --trials 64
"""

from lpclip.config import TuneJob
from lpclip.jobs.cli import main


def run(job: TuneJob) -> None:
    """Run the job. The libraries are imported here: --help and wrong flags need not wait for them."""
    from lpclip.jobs.tune import tune_job

    tune_job(job)


if __name__ == "__main__":
    main(run, TuneJob)
