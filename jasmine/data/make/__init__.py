"""Makes datasets: `python -m jasmine.data.make KIND --output_dir D …`; `--help` lists the kinds and their options.

A kind turns a game, a folder of videos or a folder of images into `D/{train,val,test}/`, each an episode split as
`jasmine.data.writer` writes them, and `D/make.json`, which says from what the dataset was made.

Invariants:
- an episode is a pure function of (options, seed, split, episode number), so a dataset that was interrupted and is
  made again with the same options is byte for byte the one that an uninterrupted run writes, with any `--num_workers`;
- splits share nothing: no level of a game, no episode, no file;
- `actions[t]` is the action taken upon seeing `frames[t]`; it leads to `frames[t + 1]`. The last one of an episode
  led to its end, or to a frame that was cut off by `--max_episode_length`.
"""
