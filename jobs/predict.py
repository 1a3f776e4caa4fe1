"""Label images with a saved probe.

python jobs/predict.py --probe runs/selftrain/probe --data photos/ --out labels.parquet
"""

from lpclip.cli import main
from lpclip.config import PredictJob
from lpclip.workflow import predict_job

if __name__ == "__main__":
    main(predict_job, PredictJob)
