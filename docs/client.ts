// A ranker's client with types: `make types` makes adrank.ts of the OpenAPI document, and compiles this beside it.
import type { components, paths } from "./adrank";

type Schemas = components["schemas"];
type Body<Path extends "/v1/rank" | "/v1/events"> = paths[Path]["post"]["requestBody"]["content"]["application/json"];

async function post<Answer>(url: string, body: unknown): Promise<Answer> {
  const answer = await fetch(url, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(((await answer.json()) as Schemas["Problem"]).detail);
  return (await answer.json()) as Answer;
}

/** The ids of ads, the likeliest click first. */
export async function ranked(url: string, request: Body<"/v1/rank">): Promise<string[]> {
  const { ads } = await post<Schemas["RankAnswer"]>(`${url}/v1/rank`, request);
  return ads.map((ad) => ad.ad_id);
}

export const tell = (url: string, batch: Body<"/v1/events">) => post<Schemas["EventsAnswer"]>(`${url}/v1/events`, batch);

await ranked("http://127.0.0.1:8000", { user: { id: "u3" }, candidates: ["a1", "a4"], context: { slot: "feed" } });
// @ts-expect-error: a request without candidates is no request
await ranked("http://127.0.0.1:8000", { user: { id: "u3" } });
