"""Label images with a saved probe.

python jobs/predict.py --probe runs/selftrain/probe --data photos/ --out labels.parquet
"""

from lpclip.cli import main
from lpclip.config import PredictJob


def run(job: PredictJob) -> None:
    """Run the job. The libraries are imported here: --help and wrong flags need not wait for them."""
    from lpclip.workflows.predict import predict_job

    predict_job(job)


if __name__ == "__main__":
    main(run, PredictJob)
