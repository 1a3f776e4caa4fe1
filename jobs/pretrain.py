"""Train a dual encoder on image-text pairs, noisy ones included, for the other jobs to use.

python jobs/pretrain.py --data pairs/ --encoder ViT-B-32 --pretrained laion2b_s34b_b79k --learning-rate 1e-5
"""

from lpclip.jobs.cli import run_command

if __name__ == "__main__":
    run_command("pretrain")
