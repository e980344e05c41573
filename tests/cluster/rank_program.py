"""A rank that notes its place and ends as it is told: PROGRAM_<port> is its exit code, or waits for a signal."""

import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    read = os.environ
    told = read[f"PROGRAM_{read['MASTER_PORT']}"]
    if told == "waits":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    place = [read["LOCAL_RANK"], read["GROUP_RANK"], read["WORLD_SIZE"], read["LOCAL_WORLD_SIZE"], *sys.argv[1:]]
    (Path(read["PROGRAM_FOLDER"]) / f"rank-{read['MASTER_PORT']}-{read['RANK']}").write_text(" ".join(place))
    if told == "waits":
        while True:
            time.sleep(0.05)
    sys.exit(int(told.split()[int(read["RANK"])] if " " in told else told))
