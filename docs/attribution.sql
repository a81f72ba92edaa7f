-- Attribution (docs/log.md) in Spark's SQL, equal row for row to training/join/attribution.py. It reads three views: `impressions` and
-- `events`, the files of LOG/raw/impressions and LOG/raw/events, and `settings`, one row of seconds (docs/scale.md makes them).
-- A row is an ad that was shown; more columns of the files may be named beside `policy`, and of lists beside `p_click`. What is fitted to the whole
-- log, `conversion_maturity`, `adrank attribute` alone has.
WITH
rankings AS (  -- what stands twice, as after a kill, is one
  SELECT * FROM (
    SELECT *, row_number() OVER (PARTITION BY request_id, entry ORDER BY received) AS copy FROM impressions
  ) WHERE copy = 1
),
places AS (  -- a row an ad of an answer
  SELECT *, explode(sequence(1, CAST(size(ad_id) AS INT))) AS place FROM rankings WHERE size(ad_id) > 0
),
ads AS (
  SELECT
    request_id, entry, since, ts, user_id, model, version, policy, place, shown,
    element_at(ad_id, place) AS ad_id,
    element_at(position, place) AS answered_at,
    element_at(p_click, place) AS p_click,
    element_at(propensity, place) AS propensity
  FROM places
),
came AS (  -- the same type, subject and id is one event: the first that was received
  SELECT * FROM (
    SELECT *, row_number() OVER (
      PARTITION BY type, CASE WHEN type = 'click' THEN user_id ELSE request_id END, event_id ORDER BY received, entry
    ) AS copy FROM events
  ) WHERE copy = 1
),
pairs AS (  -- rankings that an event may belong to, the nearest before it first; then those that were made up to a minute after it
  SELECT
    came.type, came.at AS happened, came.received, came.event_id, came.position, came.value, came.ts AS event_ts,
    ads.request_id, ads.entry, ads.ad_id, ads.since,
    row_number() OVER (
      PARTITION BY came.type, came.entry, came.event_id
      ORDER BY CASE WHEN came.at >= ads.since THEN came.at - ads.since ELSE 86400 - (came.at - ads.since) END, ads.entry DESC
    ) AS nearest
  FROM came JOIN ads ON came.request_id = ads.request_id AND came.ad_id = ads.ad_id
  WHERE (came.user_id = '' OR came.user_id = ads.user_id) AND came.at - ads.since >= -60
),
joined AS (  -- those that came in time
  SELECT pairs.*, row_number() OVER (PARTITION BY type, request_id, pairs.entry, ad_id ORDER BY event_ts, event_id) AS turn
  FROM pairs CROSS JOIN settings
  WHERE nearest = 1
    AND happened - since <= CASE type WHEN 'click' THEN click_window WHEN 'impression' THEN impression_window ELSE conversion_window END
    AND (type = 'conversion'
      OR received <= since + CASE type WHEN 'click' THEN click_window ELSE impression_window END + lateness)
),
outcomes AS (  -- of an ad of an answer
  SELECT
    request_id, entry, ad_id,
    min(CASE WHEN type = 'click' THEN event_ts END) AS click_ts,
    count(CASE WHEN type = 'impression' THEN 1 END) > 0 AS reported,
    max(CASE WHEN type = 'impression' AND turn = 1 THEN position END) AS reported_at,
    sum(CASE WHEN type = 'conversion' THEN coalesce(value, 0) END) AS value
  FROM joined GROUP BY request_id, entry, ad_id
)
SELECT
  CASE WHEN click_ts IS NULL THEN 0 ELSE 1 END AS label,
  coalesce(reported_at, answered_at) AS position,
  CASE WHEN value IS NULL THEN 0 ELSE 1 END AS conversion,
  CAST(floor(ads.ts) AS BIGINT) AS ts,
  ads.ad_id, p_click, propensity, value, click_ts, ads.request_id, model, version, ads.user_id, policy
FROM ads CROSS JOIN settings
LEFT JOIN outcomes ON ads.request_id = outcomes.request_id AND ads.entry = outcomes.entry AND ads.ad_id = outcomes.ad_id
WHERE ads.since <= closed AND (ads.place <= ads.shown OR reported)
ORDER BY ads.since, ads.entry, ads.place
