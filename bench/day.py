"""What autoscaling costs over a day, beside an oracle that knows the day and whose replicas start in no time.

    python bench/day.py [--quick] [--days even,bursts,conversations] [--seed 11]

Questions about documents of some 20,000 tokens on Llama 3.1 70B (four H100 a replica, start-up of 60 s): five times an
hour as many at noon as ten, at night one, in Shoal's simulator with the router, the scheduler and the policies that
serve. The objective is the time to the first token, to be kept for 99 % of requests. The oracle's schedule is the
cheapest of its family that does (day.py's `oracle_schedule`).
"""
