"""Choose the images of a run whose labels would help most.

python jobs/suggest.py --run runs/photos --count 50
"""

from lpclip.jobs.cli import run_command

if __name__ == "__main__":
    run_command("suggest")
