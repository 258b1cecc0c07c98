"""`msvit bench`: is there a gain on the clock, and how much of the one that MACs promise?"""
