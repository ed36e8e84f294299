/** A recording in JupyterLab's main area: what a double click on an `.iwrec` file in the file browser opens. */

import { PathExt } from '@jupyterlab/coreutils';
import { ABCWidgetFactory, Base64ModelFactory, DocumentWidget } from '@jupyterlab/docregistry';
import type { DocumentRegistry } from '@jupyterlab/docregistry';
import type { Contents } from '@jupyterlab/services';
import type { Message } from '@lumino/messaging';
import { Widget } from '@lumino/widgets';

import { publish } from '../stats';
import { bytes as size } from '../views/format';
import { Replay } from '../views/replay';
import type { ReplayOptions } from '../views/replay';
import type { Translation } from '../views/translation';
import { workbenchIcon } from './icon';

export const RECORDING_FILE_TYPE = 'inference-workbench-recording';
export const RECORDING_FACTORY = 'Inference Workbench Recording';
export const RECORDING_MODEL = 'inference-workbench-recording';

/** From here on opening takes long enough to say how much there is. */
const LARGE_BYTES = 32 * 2 ** 20;
/** Base64 of more than this is longer than a string of the browser may be. */
const MOST_BYTES = 360 * 2 ** 20;

export function recordingFileType(trans: Translation): Partial<DocumentRegistry.IFileType> {
  return {
    name: RECORDING_FILE_TYPE,
    displayName: trans.__('Inference Workbench Recording'),
    extensions: ['.iwrec'],
    mimeTypes: ['application/vnd.inference-workbench.recording'],
    contentType: 'file',
    fileFormat: 'base64',
    icon: workbenchIcon
  };
}

/** Reads no content: the view asks for it itself, once it knows how large it is. */
export class RecordingModelFactory extends Base64ModelFactory {
  override get name(): string {
    return RECORDING_MODEL;
  }

  override get fileFormat(): Contents.FileFormat {
    return null;
  }
}

/** A replay as a Lumino widget; it is given bytes, or says what is wrong. */
export class RecordingView extends Widget {
  readonly replay: Replay;
  private withdraw: () => void = () => undefined;

  constructor(options: ReplayOptions) {
    super();
    this.addClass('iw-panel');
    this.replay = new Replay(options);
    this.node.append(this.replay.element);
    this.node.tabIndex = -1;
  }

  async open(content: Uint8Array<ArrayBuffer>): Promise<void> {
    this.withdraw();
    if (await this.replay.open(content)) {
      this.withdraw = publish(this.replay.workbench!, this.replay);
    }
  }

  override dispose(): void {
    if (!this.isDisposed) {
      this.withdraw();
      this.replay.dispose();
    }
    super.dispose();
  }

  protected override onAfterShow(message: Message): void {
    super.onAfterShow(message);
    this.replay.refresh();
  }

  protected override onActivateRequest(message: Message): void {
    super.onActivateRequest(message);
    this.node.focus();
  }
}

export class RecordingFactory extends ABCWidgetFactory<DocumentWidget<RecordingView>> {
  constructor(
    private readonly contents: Contents.IManager,
    private readonly replayOptions: ReplayOptions,
    private readonly trans: Translation
  ) {
    super({
      name: RECORDING_FACTORY,
      label: trans.__('Inference Workbench Recording'),
      modelName: RECORDING_MODEL,
      fileTypes: [RECORDING_FILE_TYPE],
      defaultFor: [RECORDING_FILE_TYPE],
      readOnly: true
    });
  }

  protected createNewWidget(context: DocumentRegistry.Context): DocumentWidget<RecordingView> {
    const content = new RecordingView(this.replayOptions);
    const widget = new DocumentWidget({ content, context });
    widget.title.icon = workbenchIcon;
    widget.toolbar.hide();
    const load = () => void this.load(context, content);
    void context.ready.then(load);
    context.fileChanged.connect(load);
    return widget;
  }

  private async load(context: DocumentRegistry.Context, view: RecordingView): Promise<void> {
    const { trans } = this;
    const name = PathExt.basename(context.path);
    const total = context.contentsModel?.size ?? 0;
    if (total > MOST_BYTES) {
      view.replay.fail(
        trans.__(
          '%1 is too large to be opened here: %2, and a page can take %3. Open it in a notebook with inference_workbench.open_recording().',
          name,
          size(total),
          size(MOST_BYTES)
        )
      );
      return;
    }
    view.replay.say(
      total > LARGE_BYTES
        ? trans.__('Reading %1: %2. That takes a while.', name, size(total))
        : trans.__('Reading %1…', name)
    );
    try {
      const file = await this.contents.get(context.path, { type: 'file', format: 'base64', content: true });
      await view.open(fromBase64(String(file.content)));
    } catch (error) {
      view.replay.fail(
        trans.__('%1 could not be read: %2', name, error instanceof Error ? error.message : String(error))
      );
    }
  }
}

function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  // Jupyter breaks its base64 into lines.
  const binary = atob(text.replaceAll('\n', ''));
  const content = new Uint8Array(binary.length);
  for (let at = 0; at < binary.length; at++) {
    content[at] = binary.charCodeAt(at);
  }
  return content;
}
