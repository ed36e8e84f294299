/** The standalone page: one HTML file that holds this script and a recording, and needs no server and no network. */

import { publish } from './stats';
import { Replay } from './views/replay';

/** The element that holds the recording, in base64. */
const DATA_ID = 'inference-workbench-recording';

async function main(): Promise<void> {
  const replay = new Replay();
  document.body.append(replay.element);
  const data = document.getElementById(DATA_ID)?.textContent?.trim();
  if (!data) {
    replay.fail('This page holds no recording: it was cut off, or made by another program. Export it again.');
    return;
  }
  replay.say('Opening the recording…');
  let bytes: Uint8Array<ArrayBuffer>;
  try {
    bytes = decodeBase64(data);
  } catch {
    replay.fail('The recording in this page is damaged: it is not base64. Export it again.');
    return;
  }
  if (await replay.open(bytes)) {
    publish(replay.workbench!, replay);
  }
}

export function decodeBase64(text: string): Uint8Array<ArrayBuffer> {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let at = 0; at < binary.length; at++) {
    bytes[at] = binary.charCodeAt(at);
  }
  return bytes;
}

void main();
