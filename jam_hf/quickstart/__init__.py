"""The project's main job on real input: from nothing to a picture book, stage by stage, in one folder."""
